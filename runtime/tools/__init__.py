"""What people see: checks, explanations, measurements, pictures, editors."""
