"""Small kernels that the tests of tessera.jit compile and launch. A package, so that its files are one cache key."""
