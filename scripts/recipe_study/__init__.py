"""What a training recipe is worth on subjects that no other study uses."""
