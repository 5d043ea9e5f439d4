#define QUIRE_LEVEL plain
#define QUIRE_WIDTH 4
#include "level.inc"
