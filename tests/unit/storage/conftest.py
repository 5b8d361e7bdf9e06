from hypothesis import settings

# A busy machine is slow, not wrong.
settings.register_profile("storage", deadline=None)
settings.load_profile("storage")
