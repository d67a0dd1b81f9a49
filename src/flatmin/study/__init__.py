"""Many runs: what is run, where results are kept, what follows from them."""
