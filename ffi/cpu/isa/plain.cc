// Task bodies for any processor.
#define MPK_ISA plain
#define MPK_ISA_NAME "plain"
#define MPK_W 4
#include "body.h"
