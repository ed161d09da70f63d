"""The engine: requests in, pictures out, one denoising step at a time. Knows no HTTP, users, jobs or settings."""
