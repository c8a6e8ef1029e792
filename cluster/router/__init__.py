"""Tiny ada, the router: from a prompt to the domains that should answer it, or none of them.

`features` turns text into hashed n-grams, `lexicon` knows which of them training saw, `encoder` makes them one unit
vector, with what counting alone says of them (`naive_bayes`), `head` one logit per domain and one for none, `policy`
weights to mix. `tiny_ada` is all of them together. `prototypes` and `calibration` fit the head's rows and numbers,
`episodes` hides words and domains in training, `fit` trains, `topics` tells kinds of one domain apart.
`scoring` makes the head's rows whole numbers, `reliability` says what its probabilities are worth.

A domain comes later by `few_shot` rows from its `examples`, or `data_free`; `domain_prototypes` are such rows as a
file, and `assembly` makes one router of all that the catalog names. `sentence_model` is a pretrained encoder:
`sentence_encoder` puts it beside the n-grams, `teaching` and `word_vectors` take over what it knows. `conversation`
reads a chat's turns, `explanation` says why a prompt went where it did.
"""
