"""What flatmin costs: `python -m benchmarks NAME`, from the root of the repository. See README.md beside this file."""
