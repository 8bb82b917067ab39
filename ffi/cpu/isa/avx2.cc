// Task bodies for AVX2 processors.
#define MPK_ISA avx2
#define MPK_ISA_NAME "avx2"
#define MPK_W 8
#include "body.h"
