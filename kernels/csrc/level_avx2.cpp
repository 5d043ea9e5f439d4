#define QUIRE_LEVEL avx2
#define QUIRE_WIDTH 8
#include "level.inc"
