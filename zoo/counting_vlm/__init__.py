"""A small vision-language model that counts, finds and names shapes in a grid."""
