"""Finding the stages: closed-form optimal denoiser -> agreement of noise levels -> partition."""
