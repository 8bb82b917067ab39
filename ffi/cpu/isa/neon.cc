// Task bodies for NEON processors.
#define MPK_ISA neon
#define MPK_ISA_NAME "neon"
#define MPK_W 4
#include "body.h"
