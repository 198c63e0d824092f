// SPDX-License-Identifier: Apache-2.0
// Keeps the extension loadable on glibc 2.28 (RHEL 8, manylinux_2_28) where it is built on a newer
// one. libstdc++ asks glibc >= 2.32 whether the process has a single thread, to spare the atomics
// of std::shared_ptr. This answer of our own, seen by this library alone, is always safe: it may
// have more.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
