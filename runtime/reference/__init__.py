"""The float64 meaning of the whole language, straight from the checked tree: shares nothing with the compiler."""
