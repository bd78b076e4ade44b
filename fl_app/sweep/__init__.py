"""Many runs by one command: planned and checked as a whole, run in processes of their own, recorded in one file."""
