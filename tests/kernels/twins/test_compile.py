"""Every kernel compiles to machine code for NVIDIA GPUs of three generations, on machines without any GPU."""
