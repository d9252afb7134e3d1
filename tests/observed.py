"""`Observed`: an application whose answers are reported to a test."""

from starlette.types import ASGIApp, Receive, Scope, Send

from downloadview_async import Accounts, Outcome


class Observed:
    """An application with an observer of its answers."""

    def __init__(self, app: ASGIApp) -> None:
        self.outcomes: list[Outcome] = []
        self._app = Accounts(app, observers=[self.outcomes.append])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def only(self) -> Outcome:
        """Return the one outcome since the last call."""
        outcomes, self.outcomes[:] = [*self.outcomes], []
        assert len(outcomes) == 1, outcomes
        assert outcomes[0].seconds >= 0
        return outcomes[0]
