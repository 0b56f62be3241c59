"""Many runs that differ in some keys: a grid, random draws, or a search by Optuna, shared by any number of processes."""
