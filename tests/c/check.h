// What the programs of this folder say of what they check: every failure with its line and the last
// error of the library.
#ifndef CHECK_H
#define CHECK_H

#include <hybridkv.h>
#include <stdio.h>
#include <string.h>

static int failures = 0;

static void check(int ok, const char* what, int line) {
  if (!ok) {
    failures++;
    printf("line %d: %s; last error: %s\n", line, what, hkv_last_error());
  }
}
#define CHECK(condition) check(condition, #condition, __LINE__)
#define CHECK_ERROR(call, status, words)                                                      \
  check((call) == (status) && strstr(hkv_last_error(), words) != NULL, #call " gives " words, \
        __LINE__)

#endif
