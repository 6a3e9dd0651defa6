"""The integer mixing of `sample` and `page_digest` for Metal sources."""

MIX32 = """
inline uint sixfold_mix32(uint h) {
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return h ^ (h >> 16);
}
"""
