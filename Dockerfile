ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
WORKDIR /src
RUN python -m venv --without-pip /opt/loom
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY bus bus
COPY agents agents
COPY phases phases
COPY runner runner
COPY loom loom
RUN pip --python /opt/loom/bin/python install --no-cache-dir --disable-pip-version-check '.[fast]'

FROM python:${PYTHON}-slim
# The base image comes without byte code and containers cannot write any: every health check would compile again.
RUN python -m compileall -qq -j 0 /usr/local/lib || true  # a file that does not compile costs only its own time
COPY --from=build /opt/loom /opt/loom
ENV PATH=/opt/loom/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["loom"]
CMD ["--help"]
