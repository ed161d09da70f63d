"""Image to video, experimental: a start picture moves, by SDXL, LoRAs and a motion adapter.

Knows clips (all frames of a video at one noise level) and how they are denoised, between an engine's own steps. Knows
no jobs, settings, HTTP or video files.
"""
