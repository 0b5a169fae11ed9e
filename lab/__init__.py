"""What uses the package to prove something: experiments, reports, sweeps, the benchmark."""
