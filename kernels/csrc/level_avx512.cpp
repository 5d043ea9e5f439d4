#define QUIRE_LEVEL avx512
#define QUIRE_WIDTH 16
#include "level.inc"
