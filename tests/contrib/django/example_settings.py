"""The settings of the example, with passwords that are hashed in no time: each of its tests logs in anew."""

from examples.django.project.settings import *  # noqa: F403

PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
