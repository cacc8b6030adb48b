"""The parts of the Hopper kernels, one idea a file."""
