"""What compiled plans do on a GPU, counted without one."""
