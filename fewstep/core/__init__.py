"""The mathematics everything else agrees on: the process, the denoiser contract and batches."""
