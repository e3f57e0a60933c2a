"""Label names to word vectors: from GloVe, fastText and word2vec files, and from text encoders."""

from mlfsic_jax.data.words import main

if __name__ == "__main__":
    main()
