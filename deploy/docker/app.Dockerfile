# An application of your own, with its files outside of the image. Copy this file into your project as Dockerfile, beside
# main.py with `app` in it, and requirements.txt with downloadview_async[server] and whatever else it needs.
#   docker build -t invoices .
#   docker run --rm --read-only --cap-drop ALL -p 127.0.0.1:8000:8000 -v /srv/invoices:/srv/app/invoices:ro invoices

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /srv/venv
ENV PATH=/srv/venv/bin:$PATH
WORKDIR /build
# wheels/: packages that are on no index; requirements.txt names each by its file, such as ./NAME.whl
COPY requirements.txt wheels* ./
RUN pip install --requirement requirements.txt && python -m compileall -q /srv/venv

FROM python:3.13-slim
COPY --from=build /srv/venv /srv/venv
ENV PATH=/srv/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /srv/app
COPY main.py ./
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# any answer means that the application answers; bash is in the base image, and starts faster than Python
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8000 && printf 'HEAD / HTTP/1.0\\r\\n\\r\\n' >&3 && read -r line <&3 && [[ $line == HTTP/1.?' '[234]* ]]"]
# set FORWARDED_ALLOW_IPS to the address of the proxy, so that its X-Forwarded-For names the clients
CMD ["uvicorn", "main:app", "--host", "0.0.0.0", "--port", "8000", "--http", "downloadview_async.asgi.server:DownloadProtocol"]
