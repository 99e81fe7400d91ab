"""What crosstalk is made of: the plan, the measurements, the record and its plots."""
