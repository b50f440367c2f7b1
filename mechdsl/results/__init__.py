"""Effects with their statistics, and the document that machines read.

`effect` says what an effect is, `statistics` computes means, intervals and p, `experiment` holds
the results of a run in memory, `document` is the JSON form. Nothing is imported here, because
`validate` needs `effect` only, and numpy isn't free.
"""
