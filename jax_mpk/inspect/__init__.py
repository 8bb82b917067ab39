"""Looking at compiled functions: text listings, hops and their reasons, drawings, costs."""
