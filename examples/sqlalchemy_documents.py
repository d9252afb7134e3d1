"""Documents in a database with their files in a directory: an `ObjectSource` with asynchronous SQLAlchemy 2.

    EXAMPLE_FILES=/srv/files EXAMPLE_DATABASE=sqlite+aiosqlite:///documents.db \
        uvicorn --factory examples.sqlalchemy_documents:create_app

`find` closes its session before it returns, so a download does not hold a connection of the pool while its bytes are
sent, even to a client that takes an hour. /pool shows how many connections are in use.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import QueuePool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from downloadview_async import Download, ObjectSource, PathSource


class Base(DeclarativeBase):
    """The tables of this example."""


class Document(Base):
    """A document and its file."""

    __tablename__ = "documents"

    key: Mapped[str] = mapped_column(primary_key=True)
    path: Mapped[str | None]  # relative to EXAMPLE_FILES; empty until the upload, which gives 404
    title: Mapped[str]
    content_type: Mapped[str | None]


def documents(engine: AsyncEngine, directory: str) -> ObjectSource:
    """Return a source that looks up a row by its key, and opens the file that the row names."""
    sessions = async_sessionmaker(engine)

    async def find(key: str) -> Document | None:
        async with sessions() as session:
            document: Document | None = await session.scalar(select(Document).where(Document.key == key))
        return document  # the session is closed, and its connection is back in the pool

    return ObjectSource(
        find,
        source=PathSource(directory),
        file_field="path",
        basename_field="title",
        mime_type_field="content_type",
    )


async def pool(request: Request) -> JSONResponse:
    queue = request.app.state.engine.pool
    assert isinstance(queue, QueuePool)
    return JSONResponse({"checked_out": queue.checkedout()})


def create_app() -> Starlette:
    """Return the application, configured by the EXAMPLE_* variables."""
    engine = create_async_engine(os.environ["EXAMPLE_DATABASE"])

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield
        await engine.dispose()

    app = Starlette(
        routes=[
            Route("/documents/{key}", Download(documents(engine, os.environ["EXAMPLE_FILES"]))),
            Route("/pool", pool),
        ],
        lifespan=lifespan,
    )
    app.state.engine = engine
    return app
