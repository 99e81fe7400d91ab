"""What SBoRA costs beside other adapters: measured, recorded, and drawn from the record alone."""
