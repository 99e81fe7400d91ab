"""The methods that SBoRA is compared with: the same base, loop, captions and pictures for all."""
