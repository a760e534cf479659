"""What one sees of a run beside its metrics: figures, pictures, profiles. None of it may change what is computed."""
