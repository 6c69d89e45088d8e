"""`taming ar sample`: what it reads, checks and writes."""
