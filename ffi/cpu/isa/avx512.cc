// Task bodies for AVX-512 processors.
#define MPK_ISA avx512
#define MPK_ISA_NAME "avx512"
#define MPK_W 16
#include "body.h"
