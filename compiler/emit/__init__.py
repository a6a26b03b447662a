"""Plan to Triton source: a line writer, the op table's texts and one file per kernel skeleton."""
