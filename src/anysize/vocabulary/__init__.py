"""Cut the vocabulary: which tokens are kept, and the tokenizer and configs that speak of them under their new ids."""
