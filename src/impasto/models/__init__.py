"""Where models come from and what their networks are. Knows no requests, samplers or LoRAs."""
