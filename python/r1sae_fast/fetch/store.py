"""The bucket, through obstore: anonymous, at any endpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from r1sae_fast.errors import FetchError, MissingExtraError
from r1sae_fast.fetch.catalogue import BUCKET, ENDPOINT_VARIABLE, REGION

if TYPE_CHECKING:
    from datetime import timedelta

    from obstore.store import S3Store

# A connection on which nothing comes for so long is dropped and made anew.
_READ_TIMEOUT = "30s"


@dataclass(frozen=True)
class Remote:
    """An object as the server describes it."""

    name: str
    size: int
    etag: str


class Bucket:
    """The bucket at an endpoint; every request is anonymous.

    Raises:
        MissingExtraError: obstore is not installed.
        ValueError: an endpoint that is no http(s) URL.
    """

    def __init__(self, endpoint: str | None = None, read_timeout: timedelta | None = None) -> None:
        try:
            from obstore.store import S3Store
        except ImportError:
            raise MissingExtraError(
                "fetching needs obstore, which is not installed: pip install 'r1sae-fast[fetch]'"
            ) from None
        self.endpoint = endpoint or os.environ.get(ENDPOINT_VARIABLE) or None
        if self.endpoint is not None:
            parts = urlsplit(self.endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(
                    f"endpoint {self.endpoint!r} is no URL; expected such as "
                    "https://s3.example.org (the name of the bucket is added to it)"
                )
        plain = self.endpoint is not None and self.endpoint.startswith("http://")
        self.store: S3Store = S3Store(
            BUCKET,
            region=REGION,
            skip_signature=True,
            # Given even where it is Amazon's, or else variables of the environment would count.
            endpoint=self.endpoint or f"https://s3.{REGION}.amazonaws.com",
            virtual_hosted_style_request=False,
            client_options={
                "allow_http": plain,
                "connect_timeout": "10s",
                "read_timeout": read_timeout or _READ_TIMEOUT,
                "timeout": "24h",  # of a whole request: a slow line is no error
                "http1_only": True,  # a connection for each of the parallel ranges
            },
            # What is left to us: we know how far a range came.
            retry_config={"max_retries": 0},
        )

    def __str__(self) -> str:
        return f"{self.endpoint or f'https://s3.{REGION}.amazonaws.com'}/{BUCKET}"


def explain(bucket: Bucket, key: str, error: Exception) -> FetchError | None:
    """What to raise for an error that trying again doesn't mend; None for any other."""
    from obstore import exceptions

    where = f"{bucket}/{key}"
    if isinstance(error, exceptions.NotFoundError | FileNotFoundError):
        return FetchError(
            f"{where}: not there (404); check the endpoint, or whether the release has moved"
        )
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return FetchError(
            f"{where}: the server refuses it to anonymous readers (403; S3 says so of missing "
            "objects too); check the endpoint, or whether the release has moved"
        )
    if isinstance(error, exceptions.PreconditionError):
        return FetchError(
            f"{where}: changed on the server while it was fetched; run the same again, which "
            "starts anew"
        )
    return None
