"""What several tests share: small federations of real parts."""
