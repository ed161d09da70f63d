"""What we compare with, written as somebody who uses diffusers well would write it."""
