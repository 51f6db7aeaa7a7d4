"""GPU kernels in Triton, one operation per file. Importing one needs Triton, which comes with torch for CUDA."""
