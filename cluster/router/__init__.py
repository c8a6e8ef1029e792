"""Tiny ada, the router: from a prompt to the domains that should answer it, or none of them.

`features` turns text into hashed n-grams, `lexicon` knows which of them training saw, `encoder` makes them one unit
vector, `head` one logit per domain and one for none, `policy` weights to mix. `tiny_ada` is all of them together.
`prototypes` and `calibration` fit the head's rows and numbers, `episodes` hides words and domains in training, `fit`
trains. `sentence_model` is a pretrained encoder, `sentence_encoder` puts it beside the n-grams.
"""
