"""Training on ciphertexts: an owner holds the key and the data, a compute party the model (CKKS, by TenSEAL's SEAL)."""
