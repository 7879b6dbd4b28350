"""The questions of the paper's tables, asked anew at a small scale, beside the paper's figures."""
