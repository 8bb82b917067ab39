"""``python -m jax_mpk``: the table of knobs; ``constants`` and ``calibrate``: what `implementation=None` predicts with."""

import argparse

from jax_mpk.options import current, describe

PLATFORMS = ("cpu", "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jax_mpk", description="Without a command: the table of knobs.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, help in (
        ("constants", "the constants that implementation=None predicts with on this machine"),
        ("calibrate", "measure this machine's, print them, and keep them in the cache"),
    ):
        commands.add_parser(name, help=help).add_argument(
            "--platform", choices=PLATFORMS, help="default: what JAX finds"
        )
    args = parser.parse_args()
    if args.command is None:
        print(describe())
        return
    import jax

    from jax_mpk import backends
    from jax_mpk.predict import calibrate

    if args.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    platform = args.platform or {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if args.command == "calibrate":
        print(calibrate.calibrate(platform))
    else:
        print(calibrate.constants(backends.get(platform).device(current()), current()))


if __name__ == "__main__":
    main()
