"""The methods compared: what each gives alone, what merging costs it, tables from the records."""
