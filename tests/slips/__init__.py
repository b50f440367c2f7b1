"""Files with one typing error each, and their diagnostics."""
